"""How a model learns the scenes of `demo.scenes`: first its vision tower, then its text model."""
