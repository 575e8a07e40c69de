"""What weights are multiplied with, on tokens that a user gives, and what follows from it."""
