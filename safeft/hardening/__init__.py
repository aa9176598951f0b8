"""Making refusal hang on more neurons than it does."""
