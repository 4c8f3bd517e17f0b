//! Sums over pairs of tiles: how far decoded weights lie from their source.

use super::Level;

/// Lanes that take turns over the weights, so that every instruction set adds in the same order.
const LANES: usize = 8;

/// What a comparison of two runs of weights adds up, x being the reference and y the copy.
///
/// Weight i is added to lane i mod 8; the lanes are added in order at the end. All arithmetic is
/// in `f64`, a product and its sum being rounded one after the other.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ErrorSums {
    /// Weights compared.
    pub weights: u64,
    /// Sum of x².
    pub signal: f64,
    /// Sum of (x − y)².
    pub noise: f64,
    /// Sum of x·y.
    pub cross: f64,
    /// Sum of y².
    pub power: f64,
    /// Largest |x − y|.
    pub max_error: f64,
}

impl ErrorSums {
    /// Adds the sums of the weights that follow.
    pub fn merge(&mut self, other: &ErrorSums) {
        self.weights += other.weights;
        self.signal += other.signal;
        self.noise += other.noise;
        self.cross += other.cross;
        self.power += other.power;
        self.max_error = larger(self.max_error, other.max_error);
    }
}

/// The larger one; a NaN on the left is dropped, one on the right stays out.
fn larger(most: f64, error: f64) -> f64 {
    if error > most {
        error
    } else {
        most
    }
}

/// The sums of one lane set: signal, noise, cross, power, largest error.
pub(super) type Lanes = [[f64; LANES]; 5];

/// Compares `x` with `y`; the shorter one sets the length.
pub fn error_sums(level: Level, x: &[f32], y: &[f32]) -> ErrorSums {
    let count = x.len().min(y.len());
    let (x, y) = (&x[..count], &y[..count]);
    let mut lanes: Lanes = [[0.0; LANES]; 5];
    let done = super::error_lanes(level, x, y, &mut lanes);
    for (x, y) in x[done..].chunks(LANES).zip(y[done..].chunks(LANES)) {
        add(&mut lanes, x, y);
    }
    let [signal, noise, cross, power, errors] = lanes;
    let total = |lanes: [f64; LANES]| lanes.iter().sum();
    ErrorSums {
        weights: count as u64,
        signal: total(signal),
        noise: total(noise),
        cross: total(cross),
        power: total(power),
        max_error: errors.into_iter().fold(0.0, larger),
    }
}

/// Adds up to one weight to each lane.
fn add(lanes: &mut Lanes, x: &[f32], y: &[f32]) {
    for (lane, (&x, &y)) in x.iter().zip(y).enumerate() {
        let (x, y) = (f64::from(x), f64::from(y));
        let error = x - y;
        lanes[0][lane] += x * x;
        lanes[1][lane] += error * error;
        lanes[2][lane] += x * y;
        lanes[3][lane] += y * y;
        lanes[4][lane] = larger(lanes[4][lane], error.abs());
    }
}

/// Index of the first weight that is infinite or NaN.
pub fn first_nonfinite(level: Level, weights: &[f32]) -> Option<usize> {
    let mut done = super::finite_prefix(level, weights);
    // Looked for in runs without an early exit inside, which the compiler vectorises.
    for run in weights[done..].chunks(256) {
        if !run
            .iter()
            .fold(true, |all, weight| all & weight.is_finite())
        {
            let index = run.iter().position(|weight| !weight.is_finite())?;
            return Some(done + index);
        }
        done += run.len();
    }
    None
}
