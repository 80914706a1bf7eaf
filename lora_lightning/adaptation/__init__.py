"""An unlabelled target: objectives, pseudo-labels, guards, rounds, closed forms."""
