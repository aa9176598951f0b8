"""The frontier of refusal kept against domain learnt: runs, choices of knobs, results, pictures."""
