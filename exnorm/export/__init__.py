"""Trained models as files for other programs: ONNX, `torch.export`, safetensors, and a folder in timm's hub layout."""
