"""What joins normwise to other packages, imported where it is used."""
