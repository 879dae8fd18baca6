"""Mathematics split over ranks or over time: sequence-parallel attention, overlapped layers, streamed backpropagation."""
