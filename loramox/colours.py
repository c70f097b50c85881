"""One colour per meaning in every figure, from Okabe and Ito's palette, which colour-blind readers can tell apart."""

FORGET = "#d55e00"
RETAIN = "#0072b2"
RETRAINED = "#009e73"
CHOSEN = "#000001"  # ink; black itself is left out of an SVG, and a page could not turn it into its own
MUTED = "#777777"
