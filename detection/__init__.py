"""Transfer of a pre-trained ResNet-50 to object detection and instance segmentation. It does not import `src`."""
