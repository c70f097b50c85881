"""The shipped adapter: its folder, its card, how it is made, how it is switched."""
