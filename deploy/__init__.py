"""What installs, runs and demonstrates the product; no part of the wheel."""
