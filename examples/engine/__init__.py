"""A small serving engine for Llama-family models over flashtile's paged attention; README.md is the way in."""
