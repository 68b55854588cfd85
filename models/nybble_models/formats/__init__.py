"""On-disk formats: each codec turns stored tensors into a QuantizedTensor and back."""
