"""Every `minirlhf ...` command, its options and what it prints."""
