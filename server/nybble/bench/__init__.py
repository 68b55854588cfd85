"""Measures a server from the outside, over HTTP, with streams: what a client would see."""
