"""Watching refusal, and the neurons it hangs on, while a model is tuned."""
