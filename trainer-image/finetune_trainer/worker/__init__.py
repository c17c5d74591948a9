"""One training process of the gang. It sees local files only; the agent brings and takes them."""
