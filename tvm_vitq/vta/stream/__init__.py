"""Streams of instructions: from tiles of a matrix product to a stream with the tokens that keep it right."""
