"""Plain Python that every other package may use: configuration, errors, requests, evidence, metrics, deadlines."""
