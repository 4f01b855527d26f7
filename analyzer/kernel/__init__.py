"""What the kernel knows of a process: its mappings, which of their pages are resident, and who mapped them."""
