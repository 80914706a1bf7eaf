"""Lightning: the callbacks, and what they check, guard and save."""
