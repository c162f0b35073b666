"""What ships inside every archive: the pipeline, the network, the decision, and TorchServe's entry point."""
