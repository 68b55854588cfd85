"""What a checkpoint is: specs, families, formats, the loader and the reference decoder."""
