"""Readers of the files that people have: one module a format, each turns tensors into a `ParsedFile`."""
