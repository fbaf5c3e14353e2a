"""What a person states: model, hardware, workload, strategy, and the catalogues of them."""
