"""TorchServe's custom handler: the only files that know how TorchServe calls one."""
