//! One published figure: what many runs gave, and the peer's median beside it.

use serde::Serialize;

/// A figure. The keys are those of the README and never change their meaning.
#[derive(Debug, Serialize)]
pub(super) struct Figure {
    name: String,
    unit: &'static str,
    n: usize,
    min: f64,
    median: f64,
    p90: f64,
    p99: f64,
    max: f64,
    #[serde(flatten)]
    peer: Option<Peer>,
}

/// What the peer did in the same run.
#[derive(Debug, Serialize)]
struct Peer {
    peer: &'static str,
    peer_median: f64,
    /// Ours divided by the peer's median.
    ratio: f64,
}

impl Figure {
    /// Sums measurements up. `peer` holds the peer's, when it ran.
    pub(super) fn new(
        name: impl Into<String>,
        unit: &'static str,
        mut ours: Vec<f64>,
        mut peer: Vec<f64>,
    ) -> Self {
        ours.sort_by(f64::total_cmp);
        peer.sort_by(f64::total_cmp);
        let median = quantile(&ours, 50);
        let peer_median = quantile(&peer, 50);
        Self {
            name: name.into(),
            unit,
            n: ours.len(),
            min: round(quantile(&ours, 0)),
            median: round(median),
            p90: round(quantile(&ours, 90)),
            p99: round(quantile(&ours, 99)),
            max: round(quantile(&ours, 100)),
            peer: (!peer.is_empty()).then(|| Peer {
                peer: "qemu-microvm",
                peer_median: round(peer_median),
                ratio: round(median / peer_median),
            }),
        }
    }

    /// The same figure, whose peer is not QEMU alone.
    pub(super) fn beside(mut self, name: &'static str) -> Self {
        if let Some(peer) = &mut self.peer {
            peer.peer = name;
        }
        self
    }

    /// The table's heading.
    pub(super) fn heading() -> String {
        format!(
            "{:<34} {:>6} {:>4} {:>10} {:>10} {:>10} {:>10} {:>10} {:>12} {:>7}",
            "figure", "unit", "n", "min", "median", "p90", "p99", "max", "qemu median", "ratio"
        )
    }

    /// The table's row.
    pub(super) fn row(&self) -> String {
        let (peer, ratio) = match &self.peer {
            Some(peer) => (peer.peer_median.to_string(), peer.ratio.to_string()),
            None => ("-".to_owned(), "-".to_owned()),
        };
        format!(
            "{:<34} {:>6} {:>4} {:>10} {:>10} {:>10} {:>10} {:>10} {:>12} {:>7}",
            self.name,
            self.unit,
            self.n,
            self.min,
            self.median,
            self.p90,
            self.p99,
            self.max,
            peer,
            ratio
        )
    }
}

/// The value below which `percent` of the sorted values lie (nearest rank).
pub(super) fn quantile(sorted: &[f64], percent: usize) -> f64 {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// Four significant digits are more than this machine can tell.
fn round(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let digits = 3.0 - value.abs().log10().floor();
    let scale = 10f64.powf(digits.clamp(0.0, 6.0));
    (value * scale).round() / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_ratio_are_of_sorted_values() {
        let figure = Figure::new("x", "ms", vec![3.0, 1.0, 2.0, 10.0], vec![4.0, 4.0]);
        let json = serde_json::to_value(&figure).unwrap();
        assert_eq!(json["min"], 1.0);
        assert_eq!(json["median"], 2.0);
        assert_eq!(json["p90"], 10.0);
        assert_eq!(json["max"], 10.0);
        assert_eq!(json["ratio"], 0.5);
    }

    #[test]
    fn figure_without_a_peer_has_no_ratio() {
        let json = serde_json::to_value(Figure::new("x", "ms", vec![1.0], vec![])).unwrap();
        assert!(json.get("ratio").is_none());
    }
}
