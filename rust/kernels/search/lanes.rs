//! Bodies of the searches, for any width of vector. Everything is inlined into a function that is
//! compiled for the vector's instructions; without that, it would be slow beyond use.

// Indices keep loops over parallel arrays free of closures, which are not always inlined.
#![allow(clippy::needless_range_loop)]

use std::ops::{Add, Div, Mul, Sub};

use super::{AffineSearch, Fit, Weigh, EPSILON, ROUNDER};

/// Most lanes of a vector.
pub const MOST: usize = 64;

/// Makes vectors. To hold one is to know that the processor has the instructions.
pub trait Lanes: Copy {
    /// Its vectors.
    type Vector: Vector;

    /// The same value in every lane.
    fn splat(self, value: f32) -> Self::Vector;

    /// The first values, one per lane; zeros if there are not enough.
    fn load(self, values: &[f32]) -> Self::Vector;

    /// Turns `lanes` runs into one column per place in a run; runs that are missing are zeros.
    fn transpose<const N: usize>(
        self,
        lanes: usize,
        runs: &[[f32; N]],
        columns: &mut [[f32; MOST]; N],
    );
}

/// A vector of `f32`. Operators work lane by lane, each result rounded by itself.
pub trait Vector:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self>
{
    /// Lanes; at most [`MOST`].
    const COUNT: usize;
    /// One truth value per lane.
    type Mask: Copy;

    /// Writes one value per lane; nothing if there is not enough room.
    fn store(self, values: &mut [f32]);
    /// |x|
    fn abs(self) -> Self;
    /// √x
    fn sqrt(self) -> Self;
    /// `self` where it is less, otherwise `other`.
    fn min(self, other: Self) -> Self;
    /// `self` where it is more, otherwise `other`.
    fn max(self, other: Self) -> Self;
    /// Whether it is less; no where a side is NaN.
    fn lt(self, other: Self) -> Self::Mask;
    /// Whether they are equal; no where a side is NaN.
    fn eq(self, other: Self) -> Self::Mask;
    /// Whether both hold.
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Whether one holds, or both.
    fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Whether the first holds and the second does not.
    fn and_not(a: Self::Mask, b: Self::Mask) -> Self::Mask;
    /// Whether any lane's holds.
    fn any(mask: Self::Mask) -> bool;
    /// `self` where the mask holds, otherwise `other`.
    fn where_or(self, mask: Self::Mask, other: Self) -> Self;
    /// The low 23 bits of `self`, under the exponent of 2²³.
    fn low_bits_above_two_to_23(self) -> Self;
    /// The low 8 bits of `self`, as a number.
    fn low_byte(self) -> Self;
}

/// `nearest`, limited to `low..=high`.
#[derive(Clone, Copy)]
struct Nearest<V> {
    rounder: V,
    low: V,
    high: V,
}

impl<V: Vector> Nearest<V> {
    #[inline(always)]
    fn new<L: Lanes<Vector = V>>(lanes: L, low: f32, high: f32) -> Self {
        Nearest {
            rounder: lanes.splat(ROUNDER),
            low: lanes.splat(ROUNDER + low),
            high: lanes.splat(ROUNDER + high),
        }
    }

    #[inline(always)]
    fn of(self, x: V) -> V {
        // The scalar body masks the bits of the sum and takes 2²² off. Under the exponent of 2²³ the
        // same bits are `ROUNDER` more than that, and can be limited as they are.
        let bits = (x + self.rounder).low_bits_above_two_to_23();
        bits.max(self.low).min(self.high) - self.rounder
    }

    /// A result of [`Nearest::of`], wrapped to a byte.
    #[inline(always)]
    fn wrapped(self, l: V) -> V {
        (l + self.rounder).low_byte()
    }
}

/// Lane k of vector i is number i of run `first + k`; runs beyond the end are zeros.
#[inline(always)]
fn runs<L: Lanes, const N: usize>(lanes: L, numbers: &[f32], first: usize) -> [L::Vector; N] {
    let runs = numbers.as_chunks::<N>().0;
    let runs = runs.get(first..).unwrap_or_default();
    let mut columns = [[0.0; MOST]; N];
    lanes.transpose(L::Vector::COUNT, runs, &mut columns);
    let mut vectors = [lanes.splat(0.0); N];
    for i in 0..N {
        vectors[i] = lanes.load(&columns[i]);
    }
    vectors
}

/// How much each weight counts.
#[inline(always)]
fn counts<L: Lanes, const N: usize>(
    lanes: L,
    weigh: Weigh<'_>,
    first: usize,
    x: &[L::Vector; N],
) -> [L::Vector; N] {
    let mut w = *x;
    match weigh {
        Weigh::Magnitude => {
            for i in 0..N {
                w[i] = x[i].abs();
            }
        }
        Weigh::RootMeanSquare => {
            let mut squares = lanes.splat(0.0);
            for i in 0..N {
                squares = squares + x[i] * x[i];
            }
            let root = (squares / lanes.splat(N as f32)).sqrt();
            for i in 0..N {
                w[i] = root + x[i].abs();
            }
        }
        Weigh::Square => {
            for i in 0..N {
                w[i] = x[i] * x[i];
            }
        }
        Weigh::Given(given) => w = runs(lanes, given, first),
    }
    w
}

/// Writes one number of each fit.
#[inline(always)]
fn store<V: Vector>(vector: V, fits: &mut [Fit], field: fn(&mut Fit) -> &mut f32) {
    let mut values = [0.0; MOST];
    vector.store(&mut values);
    for (fit, value) in fits.iter_mut().zip(values) {
        *field(fit) = value;
    }
}

/// `fit_affine` of runs of `N`.
#[inline(always)]
pub fn fit_affine<L: Lanes, const N: usize, const ABSOLUTE: bool>(
    lanes: L,
    search: &AffineSearch,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) {
    for (group, fits) in fits.chunks_mut(L::Vector::COUNT).enumerate() {
        let first = group * L::Vector::COUNT;
        let x = runs::<L, N>(lanes, weights, first);
        let w = counts(lanes, weigh, first, &x);
        let zero = lanes.splat(0.0);
        let limit = f32::from(search.limit);
        let nearest = Nearest::new(lanes, 0.0, limit);
        let (mut least, mut most) = (x[0], x[0]);
        let (mut sum_w, mut sum_x) = (w[0], w[0] * x[0]);
        for i in 1..N {
            least = x[i].min(least);
            most = x[i].max(most);
            sum_w = sum_w + w[i];
            sum_x = sum_x + w[i] * x[i];
        }
        least = zero.where_or(zero.lt(least), least);
        let is_flat = most.eq(least);

        let step = lanes.splat(limit) / (most - least);
        let mut scale = lanes.splat(1.0) / step;
        let (mut code_scale, mut code_least) = (step, least);
        let mut codes = [zero; N];
        for i in 0..N {
            codes[i] = nearest.of(step * (x[i] - least));
        }
        let mut best = affine_error::<_, N, ABSOLUTE>(zero, scale, least, &x, &w, &codes);
        for index in 0..search.tries {
            let step = lanes.splat(search.steps(index)) / (most - least);
            let (mut sum_l, mut sum_l2, mut sum_xl) = (zero, zero, zero);
            for i in 0..N {
                let l = nearest.of(step * (x[i] - least));
                codes[i] = l;
                let wl = w[i] * l;
                sum_l = sum_l + wl;
                sum_l2 = sum_l2 + wl * l;
                sum_xl = sum_xl + wl * x[i];
            }
            let determinant = sum_w * sum_l2 - sum_l * sum_l;
            let is_solved = V::<L>::and_not(zero.lt(determinant), is_flat);
            if !V::<L>::any(is_solved) {
                continue;
            }
            let this_scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
            let this_least = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
            let is_above = zero.lt(this_least);
            let this_scale = (sum_xl / sum_l2).where_or(is_above, this_scale);
            let this_least = zero.where_or(is_above, this_least);
            let this = affine_error::<_, N, ABSOLUTE>(zero, this_scale, this_least, &x, &w, &codes);
            let wins = V::<L>::and(is_solved, this.lt(best));
            best = this.where_or(wins, best);
            scale = this_scale.where_or(wins, scale);
            code_scale = step.where_or(wins, code_scale);
            code_least = least.where_or(wins, code_least);
            least = this_least.where_or(wins, least);
        }
        store(zero.where_or(is_flat, scale), fits, |fit| &mut fit.scale);
        store(zero.where_or(is_flat, code_scale), fits, |fit| {
            &mut fit.code_scale
        });
        store(zero.where_or(is_flat, code_least), fits, |fit| {
            &mut fit.code_least
        });
        store(sum_w, fits, |fit| &mut fit.counts);
        store(least, fits, |fit| &mut fit.min);
        for fit in fits {
            fit.min = -fit.min;
        }
    }
}

type V<L> = <L as Lanes>::Vector;

/// Σ w·|scale·l + least − x|, or of the squares.
#[inline(always)]
fn affine_error<V: Vector, const N: usize, const ABSOLUTE: bool>(
    zero: V,
    scale: V,
    least: V,
    x: &[V; N],
    w: &[V; N],
    codes: &[V; N],
) -> V {
    let mut error = zero;
    for i in 0..N {
        let difference = scale * codes[i] + least - x[i];
        let difference = if ABSOLUTE {
            difference.abs()
        } else {
            difference * difference
        };
        error = error + w[i] * difference;
    }
    error
}

/// The first weight with the largest magnitude, and that magnitude.
#[inline(always)]
fn extreme<V: Vector, const N: usize>(zero: V, x: &[V; N]) -> (V, V) {
    let (mut extreme, mut most) = (zero, zero);
    for i in 0..N {
        let magnitude = x[i].abs();
        let is_more = most.lt(magnitude);
        extreme = x[i].where_or(is_more, extreme);
        most = magnitude.where_or(is_more, most);
    }
    (extreme, most)
}

/// Σ w·x·l and Σ w·l²; `wx` is w·x.
#[inline(always)]
fn symmetric_sums<V: Vector, const N: usize>(
    zero: V,
    nearest: Nearest<V>,
    step: V,
    x: &[V; N],
    w: &[V; N],
    wx: &[V; N],
) -> (V, V) {
    let (mut sum_xl, mut sum_l2) = (zero, zero);
    for i in 0..N {
        let l = nearest.of(step * x[i]);
        sum_xl = sum_xl + wx[i] * l;
        sum_l2 = sum_l2 + w[i] * l * l;
    }
    (sum_xl, sum_l2)
}

/// `fit_symmetric` of runs of `N`.
#[inline(always)]
pub fn fit_symmetric<L: Lanes, const N: usize>(
    lanes: L,
    limit: u8,
    weigh: Weigh<'_>,
    weights: &[f32],
    fits: &mut [Fit],
) {
    for (group, fits) in fits.chunks_mut(L::Vector::COUNT).enumerate() {
        let first = group * L::Vector::COUNT;
        let x = runs::<L, N>(lanes, weights, first);
        let w = counts(lanes, weigh, first, &x);
        let zero = lanes.splat(0.0);
        let limit = f32::from(limit);
        let nearest = Nearest::new(lanes, -limit, limit - 1.0);
        let (extreme, most) = extreme(zero, &x);
        let is_zero = most.lt(lanes.splat(EPSILON));
        let mut wx = w;
        let mut sum_w = zero;
        for i in 0..N {
            wx[i] = w[i] * x[i];
            sum_w = sum_w + w[i];
        }
        let mut code_scale = lanes.splat(-limit) / extreme;
        let (sum_xl, sum_l2) = symmetric_sums(zero, nearest, code_scale, &x, &w, &wx);
        let mut scale = zero.where_or(sum_l2.eq(zero), sum_xl / sum_l2);
        let mut best = scale * sum_xl;
        for index in -9..=9i8 {
            if index == 0 {
                continue;
            }
            let step = lanes.splat(-(limit + 0.1 * f32::from(index))) / extreme;
            let (sum_xl, sum_l2) = symmetric_sums(zero, nearest, step, &x, &w, &wx);
            let is_more = (best * sum_l2).lt(sum_xl * sum_xl);
            let wins = V::<L>::and(zero.lt(sum_l2), is_more);
            let this_scale = sum_xl / sum_l2;
            scale = this_scale.where_or(wins, scale);
            best = (this_scale * sum_xl).where_or(wins, best);
            code_scale = step.where_or(wins, code_scale);
        }
        store(zero.where_or(is_zero, scale), fits, |fit| &mut fit.scale);
        store(zero.where_or(is_zero, code_scale), fits, |fit| {
            &mut fit.code_scale
        });
        store(sum_w, fits, |fit| &mut fit.counts);
    }
}

/// `fit_descent` of runs of 16.
#[inline(always)]
pub fn fit_descent<L: Lanes>(lanes: L, limit: u8, weights: &[f32], fits: &mut [Fit]) {
    for (group, fits) in fits.chunks_mut(L::Vector::COUNT).enumerate() {
        let x = runs::<L, 16>(lanes, weights, group * L::Vector::COUNT);
        let zero = lanes.splat(0.0);
        let limit = f32::from(limit);
        let nearest = Nearest::new(lanes, -limit, limit - 1.0);
        let (extreme, most) = extreme(zero, &x);
        let is_zero = most.lt(lanes.splat(EPSILON));
        let step = lanes.splat(-limit) / extreme;
        let (mut w, mut wx, mut codes) = (x, x, x);
        let (mut sum_xl, mut sum_l2) = (zero, zero);
        for i in 0..16 {
            let l = nearest.of(step * x[i]);
            codes[i] = l;
            w[i] = x[i] * x[i];
            wx[i] = w[i] * x[i];
            sum_xl = sum_xl + wx[i] * l;
            sum_l2 = sum_l2 + w[i] * l * l;
        }
        for _ in 0..5 {
            let mut changes = zero.lt(zero);
            for i in 0..16 {
                let old = codes[i];
                let xl = sum_xl - wx[i] * old;
                let l2 = sum_l2 - w[i] * old * old;
                let l = nearest.of(x[i] * l2 / xl);
                let is_open = V::<L>::and_not(zero.lt(xl), l.eq(old));
                let xl = xl + wx[i] * l;
                let l2 = l2 + w[i] * l * l;
                let is_more = (sum_xl * sum_xl * l2).lt(xl * xl * sum_l2);
                let wins = V::<L>::and(V::<L>::and(is_open, zero.lt(l2)), is_more);
                codes[i] = l.where_or(wins, old);
                sum_xl = xl.where_or(wins, sum_xl);
                sum_l2 = l2.where_or(wins, sum_l2);
                changes = V::<L>::or(changes, wins);
            }
            // A lane that no code changed in would not change in another round either.
            if !V::<L>::any(changes) {
                break;
            }
        }
        let scale = (sum_xl / sum_l2).where_or(zero.lt(sum_l2), zero);
        store(zero.where_or(is_zero, scale), fits, |fit| &mut fit.scale);
    }
}

/// `fit_positive` of runs of `N`.
#[inline(always)]
pub fn fit_positive<L: Lanes, const N: usize>(
    lanes: L,
    limit: u8,
    scales: &[f32],
    counts: &[f32],
    steps: &mut [f32],
    codes_of_runs: &mut [u8],
) {
    let groups = steps.chunks_mut(L::Vector::COUNT).zip(
        codes_of_runs
            .as_chunks_mut::<N>()
            .0
            .chunks_mut(L::Vector::COUNT),
    );
    for (group, (steps, codes_of_runs)) in groups.enumerate() {
        let first = group * L::Vector::COUNT;
        let x = runs::<L, N>(lanes, scales, first);
        let w = runs::<L, N>(lanes, counts, first);
        let (zero, one) = (lanes.splat(0.0), lanes.splat(1.0));
        let limit = f32::from(limit);
        let nearest = Nearest::new(lanes, -4_194_304.0, limit);
        let without_limit = Nearest::new(lanes, -4_194_304.0, 4_194_303.0);
        let mut most = zero;
        for i in 0..N {
            // The second operand stays where the comparison does not hold.
            most = most.max(x[i]);
        }
        let is_zero = most.lt(lanes.splat(EPSILON));
        let mut step = lanes.splat(limit) / most;
        let scale = one / step;
        let mut best = zero;
        for i in 0..N {
            let l = without_limit.wrapped(without_limit.of(step * x[i]));
            let difference = x[i] - scale * l;
            best = best + w[i] * difference * difference;
        }
        for index in -4..=4i8 {
            if index == 0 {
                continue;
            }
            let this_step = lanes.splat(0.1 * f32::from(index) + limit) / most;
            let scale = one / this_step;
            let mut this = zero;
            for i in 0..N {
                let difference = x[i] - scale * nearest.of(this_step * x[i]);
                this = this + w[i] * difference * difference;
            }
            let wins = this.lt(best);
            best = this.where_or(wins, best);
            step = this_step.where_or(wins, step);
        }
        let (mut wx, mut codes) = (x, x);
        let (mut sum_xl, mut sum_l2) = (zero, zero);
        for i in 0..N {
            let l = nearest.of(step * x[i]);
            codes[i] = nearest.wrapped(l);
            wx[i] = w[i] * x[i];
            sum_xl = sum_xl + wx[i] * l;
            sum_l2 = sum_l2 + w[i] * l * l;
        }
        for _ in 0..5 {
            let mut changes = zero.lt(zero);
            for i in 0..N {
                let old = codes[i];
                let xl = sum_xl - wx[i] * old;
                let l2 = sum_l2 - w[i] * old * old;
                let l = nearest.of(x[i] * l2 / xl);
                let is_positive = V::<L>::and(zero.lt(xl), zero.lt(l2));
                let is_open = V::<L>::and_not(is_positive, l.eq(old));
                let xl = xl + wx[i] * l;
                let l2 = l2 + w[i] * l * l;
                let is_more = (sum_xl * sum_xl * l2).lt(xl * xl * sum_l2);
                let wins = V::<L>::and(is_open, is_more);
                codes[i] = nearest.wrapped(l).where_or(wins, old);
                sum_xl = xl.where_or(wins, sum_xl);
                sum_l2 = l2.where_or(wins, sum_l2);
                changes = V::<L>::or(changes, wins);
            }
            if !V::<L>::any(changes) {
                break;
            }
        }
        let scale = (sum_xl / sum_l2).where_or(zero.lt(sum_l2), zero);
        let mut values = [0.0; MOST];
        zero.where_or(is_zero, scale).store(&mut values);
        steps.copy_from_slice(&values[..steps.len()]);
        for i in 0..N {
            zero.where_or(is_zero, codes[i]).store(&mut values);
            for (stored, code) in codes_of_runs.iter_mut().zip(values) {
                stored[i] = code as u8;
            }
        }
    }
}

/// Two vectors as one, so that one computes while the other waits for its sums.
#[derive(Clone, Copy)]
pub struct Two<T>(pub T, pub T);

impl<L: Lanes> Lanes for Two<L> {
    type Vector = Two<L::Vector>;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::Vector {
        Two(self.0.splat(value), self.1.splat(value))
    }

    #[inline(always)]
    fn load(self, values: &[f32]) -> Self::Vector {
        let (low, high) = values.split_at(L::Vector::COUNT);
        Two(self.0.load(low), self.1.load(high))
    }

    #[inline(always)]
    fn transpose<const N: usize>(
        self,
        lanes: usize,
        runs: &[[f32; N]],
        columns: &mut [[f32; MOST]; N],
    ) {
        self.0.transpose(lanes, runs, columns);
    }
}

macro_rules! both {
    ($($operator:ident $method:ident;)*) => {$(
        impl<V: Vector> $operator for Two<V> {
            type Output = Self;

            #[inline(always)]
            fn $method(self, other: Self) -> Self {
                Two(self.0.$method(other.0), self.1.$method(other.1))
            }
        }
    )*};
}

both! {
    Add add;
    Sub sub;
    Mul mul;
    Div div;
}

impl<V: Vector> Vector for Two<V> {
    const COUNT: usize = 2 * V::COUNT;
    type Mask = Two<V::Mask>;

    #[inline(always)]
    fn store(self, values: &mut [f32]) {
        let (low, high) = values.split_at_mut(V::COUNT);
        self.0.store(low);
        self.1.store(high);
    }

    #[inline(always)]
    fn abs(self) -> Self {
        Two(self.0.abs(), self.1.abs())
    }

    #[inline(always)]
    fn sqrt(self) -> Self {
        Two(self.0.sqrt(), self.1.sqrt())
    }

    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Two(self.0.min(other.0), self.1.min(other.1))
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Two(self.0.max(other.0), self.1.max(other.1))
    }

    #[inline(always)]
    fn lt(self, other: Self) -> Self::Mask {
        Two(self.0.lt(other.0), self.1.lt(other.1))
    }

    #[inline(always)]
    fn eq(self, other: Self) -> Self::Mask {
        Two(self.0.eq(other.0), self.1.eq(other.1))
    }

    #[inline(always)]
    fn and(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        Two(V::and(a.0, b.0), V::and(a.1, b.1))
    }

    #[inline(always)]
    fn or(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        Two(V::or(a.0, b.0), V::or(a.1, b.1))
    }

    #[inline(always)]
    fn and_not(a: Self::Mask, b: Self::Mask) -> Self::Mask {
        Two(V::and_not(a.0, b.0), V::and_not(a.1, b.1))
    }

    #[inline(always)]
    fn any(mask: Self::Mask) -> bool {
        V::any(mask.0) || V::any(mask.1)
    }

    #[inline(always)]
    fn where_or(self, mask: Self::Mask, other: Self) -> Self {
        Two(
            self.0.where_or(mask.0, other.0),
            self.1.where_or(mask.1, other.1),
        )
    }

    #[inline(always)]
    fn low_bits_above_two_to_23(self) -> Self {
        Two(
            self.0.low_bits_above_two_to_23(),
            self.1.low_bits_above_two_to_23(),
        )
    }

    #[inline(always)]
    fn low_byte(self) -> Self {
        Two(self.0.low_byte(), self.1.low_byte())
    }
}
