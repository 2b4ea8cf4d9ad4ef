"""The Ray stages of VideoCLIP and the command that runs them."""
