"""Pure arithmetic on Array-API arrays: knows no framework, no optimizer class, no file."""
