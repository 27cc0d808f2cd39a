"""What a run has to show (paper sections 2.3, 3.2.2, 3.4, 4.4): statistics, figures and the report."""
