"""L9: the command line."""
