//! Sums over pairs of tiles: how far decoded weights lie from their source.

use super::Level;

/// Lanes that take turns over the weights, so that every instruction set adds in the same order.
const LANES: usize = 16;
/// Weights that are added up in `f32` before the sums go on in `f64`.
pub(super) const RUN: usize = 1024;
/// Sums of squares of a run that `f32` holds with room on both sides: below, squares of single
/// weights would be lost; above, they would overflow.
const TRUSTED: std::ops::RangeInclusive<f32> = 1e-20..=1e30;

/// What a comparison of two runs of weights adds up, x being the reference and y the copy.
///
/// Weight i of a run of 1024 is added to lane i mod 16 in `f32`, a product and its sum being rounded
/// one after the other; the lanes of runs are added in `f64`. A sum is good to about 1e-6 of itself.
/// Runs so small or so large that `f32` would lose them are added in `f64` throughout, and so is the
/// rest behind the last whole run.
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

/// Sums lane by lane: signal, noise, cross, power, largest error.
type Lanes = [[f64; LANES]; 5];
/// As [`Lanes`], of one run.
pub(super) type RunLanes = [[f32; LANES]; 5];

/// Compares `x` with `y`; the shorter one sets the length.
pub fn error_sums(level: Level, x: &[f32], y: &[f32]) -> ErrorSums {
    let count = x.len().min(y.len());
    let (x, x_rest) = x[..count].as_chunks::<RUN>();
    let (y, y_rest) = y[..count].as_chunks::<RUN>();
    let mut lanes: Lanes = [[0.0; LANES]; 5];
    for (x, y) in x.iter().zip(y) {
        let mut run: RunLanes = [[0.0; LANES]; 5];
        if !super::error_run(level, x, y, &mut run) {
            add_run(x, y, &mut run);
        }
        if is_trusted(&run) {
            for (lanes, run) in lanes[..4].iter_mut().zip(&run) {
                for (lane, run) in lanes.iter_mut().zip(run) {
                    *lane += f64::from(*run);
                }
            }
            for (lane, run) in lanes[4].iter_mut().zip(&run[4]) {
                *lane = larger(*lane, f64::from(*run));
            }
        } else {
            add_all(&mut lanes, x, y);
        }
    }
    add_all(&mut lanes, x_rest, y_rest);
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

/// Whether nothing was lost in `f32`. False where a sum is not a number.
fn is_trusted([signal, noise, _, power, most]: &RunLanes) -> bool {
    let is_equal = most.iter().all(|error| *error == 0.0);
    TRUSTED.contains(&total(signal))
        && TRUSTED.contains(&total(power))
        && (TRUSTED.contains(&total(noise)) || (is_equal && total(noise) == 0.0))
}

/// Sum of the lanes, by halves: the order does not matter for a bound, and this one is quick.
fn total(lanes: &[f32; LANES]) -> f32 {
    let mut sums = *lanes;
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0]
}

/// The scalar body of a run.
fn add_run(x: &[f32; RUN], y: &[f32; RUN], lanes: &mut RunLanes) {
    for (x, y) in x
        .as_chunks::<LANES>()
        .0
        .iter()
        .zip(y.as_chunks::<LANES>().0)
    {
        for lane in 0..LANES {
            let (x, y) = (x[lane], y[lane]);
            let error = x - y;
            lanes[0][lane] += x * x;
            lanes[1][lane] += error * error;
            lanes[2][lane] += x * y;
            lanes[3][lane] += y * y;
            if error.abs() > lanes[4][lane] {
                lanes[4][lane] = error.abs();
            }
        }
    }
}

fn add_all(lanes: &mut Lanes, x: &[f32], y: &[f32]) {
    for (x, y) in x.chunks(LANES).zip(y.chunks(LANES)) {
        add(lanes, x, y);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The sums in plain `f64`, one weight after the other.
    fn plain(x: &[f32], y: &[f32]) -> [f64; 5] {
        let mut sums = [0.0; 5];
        for (x, y) in x.iter().zip(y) {
            let (x, y) = (f64::from(*x), f64::from(*y));
            let terms = [x * x, (x - y) * (x - y), x * y, y * y];
            for (sum, term) in sums.iter_mut().zip(terms) {
                *sum += term;
            }
            sums[4] = f64::max(sums[4], (x - y).abs());
        }
        sums
    }

    #[test]
    fn sums_are_good_to_1e_5_at_every_scale() {
        let wave = |i: usize| ((i * 2654435761) % 1000) as f32 / 500.0 - 1.0;
        for scale in [1e-38, 1e-25, 1e-12, 1e-9, 1e-3, 1.0, 1e9, 1e14, 1e18, 1e37] {
            for error in [0.0, 1e-7, 1e-3, 0.1] {
                let x: Vec<f32> = (0..2500).map(|i| wave(i) * scale).collect();
                let y: Vec<f32> = (0..2500)
                    .map(|i| x[i] * (1.0 + error * wave(i + 7)))
                    .collect();
                for level in Level::available() {
                    let sums = error_sums(level, &x, &y);
                    let found = [
                        sums.signal,
                        sums.noise,
                        sums.cross,
                        sums.power,
                        sums.max_error,
                    ];
                    for (found, expected) in found.iter().zip(plain(&x, &y)) {
                        let bound = 1e-5 * expected.abs();
                        assert!(
                            (found - expected).abs() <= bound,
                            "{scale} {error} {found} {expected}"
                        );
                    }
                }
            }
        }
    }
}
