"""What goes onto a cluster."""
