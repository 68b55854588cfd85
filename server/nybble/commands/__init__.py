"""One file per verb of the command line. Importing any of them needs neither torch nor transformers."""
