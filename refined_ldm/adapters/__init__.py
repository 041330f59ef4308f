"""Small additions to a trained model, each in a file of its own: LoRAs, student, matcher and refiner."""
