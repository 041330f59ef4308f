"""Small additions to a trained model, each in a file of its own: LoRAs, the student of few steps, the matcher and the refiner."""
