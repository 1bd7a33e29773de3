"""Methods that factorize weight matrices after training."""
