"""What each kind of rule does at a step."""
