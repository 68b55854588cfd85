"""How close a model's answers are to those of the model it was made from, and how well it reads a text."""
