"""One colour per meaning in every figure, from Okabe and Ito's palette, which colour-blind readers can tell apart.

In pictures of a frontier each also has its own marker: forget rows a circle, retain rows a square, the retrained model a star,
and the strength chosen a diamond.
"""

FORGET = "#d55e00"
RETAIN = "#0072b2"
RETRAINED = "#009e73"
CHOSEN = "#000001"  # ink; black itself is left out of an SVG, and a page could not turn it into its own
MUTED = "#777777"
