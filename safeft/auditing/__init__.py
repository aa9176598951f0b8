"""Does refusal hang on one neuron? The audit, and what it is compared with."""
