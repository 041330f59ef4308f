"""Small additions to a trained U-Net, each in a file of its own: LoRAs, and the student that needs few steps."""
