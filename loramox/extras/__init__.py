"""What not every user runs. The core never imports from here."""
