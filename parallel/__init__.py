"""Mathematics split over ranks or over time: ring attention, overlapped layers, streamed backpropagation."""
