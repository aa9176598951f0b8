"""Reports: one result, and the views of it that a person looks at."""
