"""Features that not every user runs. The core never imports from here, and `loramox.errors.needs` guards their packages."""
