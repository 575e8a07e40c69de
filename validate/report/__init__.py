"""What a validation found, in words, in files and on the terminal."""
