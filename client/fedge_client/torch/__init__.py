"""The torch side of a client: the resident module, its data, its optimisers and its trainer."""
