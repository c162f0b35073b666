"""What ships inside every archive. It imports nothing else of this project and knows no server."""
