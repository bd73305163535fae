"""What training and analysis both draw with: planes, text, legends, predictions beside the truth."""
