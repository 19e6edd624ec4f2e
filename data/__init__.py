"""What is read, kept and drawn around the method: README.md beside this file."""
