(** * The machine-checked statements

    Every statement that hnkit lists as machine-checked is a theorem of this file, written out so that it can be read
    without the files that prove it.  What the words mean:

    - [R] is Coq's field of real numbers with MathComp's notations; [realType] is any field like it.
    - [ln] and [exp] are those of Coq's standard library; [`|x|] is the absolute value, or the norm.
    - ['M[R]_d] are the d x d matrices, ['cV[R]_d] the columns; [norm2] is the Euclidean norm ([Euclid]);
      [\tr] and [\det] are trace and determinant, [1%:M] is the identity.
    - [dist X] are the probability vectors on the finite set [X]; [push g p] is the law of [g x]; [mean q r] is
      the expectation of [r]; [kl q p], in the extended real numbers [\bar R], is the relative entropy, infinite
      unless [q] vanishes wherever [p] does ([FiniteKL]).
    - [tilt alpha r p] has weights [p x * exp (r x / alpha) / normaliser alpha r p] ([Tilt]). *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct constructive_ereal reals normedtype.
From hnkit Require Import RealBridge Euclid FiniteKL.
From hnkit Require Scalar Tilt Frontier BestOf Lemma5 Theorem7 Jacobian.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

Notation normaliser := Tilt.normaliser.
Notation tilt := Tilt.tilt.

(** ** Theorem 7 and the Frobenius bound *)

Section LogDet.
Variables (d : nat) (A : 'M[R]_d) (L : R).
Hypotheses (A_le : forall x : 'cV[R]_d, norm2 (A *m x) <= L * norm2 x) (L_lt1 : L < 1).

(** I + A is invertible, so that the logarithm below is that of a positive number. *)
Theorem det_nonzero : \det (1%:M + A) != 0.
Proof. exact: (Theorem7.det_residual_neq0 A_le L_lt1). Qed.

Theorem theorem7 : `|\tr A - ln `|\det (1%:M + A)| | <= d%:R * (- ln (1 - L) - L).
Proof. exact: (Theorem7.theorem7 A_le L_lt1). Qed.

Theorem frobenius_bound : 0 < L ->
  `|\tr A - ln `|\det (1%:M + A)| | <= (\sum_i \sum_j A i j ^+ 2) / L ^+ 2 * (- ln (1 - L) - L).
Proof. exact: (Theorem7.frobenius_bound A_le L_lt1). Qed.

End LogDet.

(** Theorem 7 for a map: [A] is the Jacobian of an [L]-Lipschitz [f] at some point. *)
Theorem theorem7_jacobian (d : nat) (f : 'cV[R]_d -> 'cV[R]_d) (L : R) (x : 'cV[R]_d) (A : 'M[R]_d) :
  (forall y z, norm2 (f y - f z) <= L * norm2 (y - z)) -> L < 1 ->
  (forall eps, 0 < eps -> exists2 delta, 0 < delta &
     forall v, norm2 v < delta -> norm2 (f (x + v) - f x - A *m v) <= eps * norm2 v) ->
  `|\tr A - ln `|\det (1%:M + A)| | <= d%:R * (- ln (1 - L) - L).
Proof. by move=> f_lip L1 fA; apply: theorem7 L1; exact: Jacobian.jacobian_le f_lip fA. Qed.

(** The Frobenius bound is never looser than Theorem 7. *)
Theorem frobenius_tighter (d : nat) (A : 'M[R]_d) (L : R) :
  (forall x : 'cV[R]_d, norm2 (A *m x) <= L * norm2 x) -> \sum_i \sum_j A i j ^+ 2 <= d%:R * L ^+ 2.
Proof. exact: Theorem7.frobenius_le_theorem7. Qed.

(** ** Lemma 5 *)

Section ResidualMaps.
Variable K : realType.

Theorem lemma5_bilipschitz (V : normedModType K) (f : V -> V) (L : K) :
  (forall x y, `|f x - f y| <= L * `|x - y|) ->
  forall x y, (1 - L) * `|x - y| <= `|(x + f x) - (y + f y)| <= (1 + L) * `|x - y|.
Proof.
move=> f_lip; apply: (@Lemma5.residual_bilipschitz K V (fun x => `|x|) _ _ f L f_lip).
- exact: ler_norm_add.
- exact: normrN.
Qed.

Theorem lemma5_injective (V : normedModType K) (f : V -> V) (L : K) :
  (forall x y, `|f x - f y| <= L * `|x - y|) -> L < 1 -> injective (fun x => x + f x).
Proof.
move=> f_lip L1; apply: (@Lemma5.residual_inj K V (fun x => `|x|) _ _ _ _ f L f_lip L1).
- exact: normr_ge0.
- exact: normr0_eq0.
- exact: ler_norm_add.
- exact: normrN.
Qed.

(** Bijective, with a Lipschitz inverse. *)
Theorem lemma5_bijective (V : completeNormedModType K) (f : V -> V) (L : K) :
  (forall x y, `|f x - f y| <= L * `|x - y|) -> L < 1 ->
  exists Tinv : V -> V, [/\ cancel (fun x => x + f x) Tinv, cancel Tinv (fun x => x + f x) &
    forall x y, `|Tinv x - Tinv y| <= `|x - y| / (1 - L)].
Proof.
move=> f_lip L1; apply: (@Lemma5.residual_inverse K V (fun x => `|x|) _ _ _ _ f L f_lip L1).
- exact: normr_ge0.
- exact: normr0_eq0.
- exact: ler_norm_add.
- exact: normrN.
- exact: Lemma5.contraction_fixpoint.
Qed.

(** The same for the Euclidean norm of [K^d]. *)
Section EuclideanSpace.
Variables (d : nat) (f : 'cV[K]_d -> 'cV[K]_d) (L : K).
Hypothesis f_lip : forall x y, norm2 (f x - f y) <= L * norm2 (x - y).

Theorem lemma5_euclidean_bilipschitz x y :
  (1 - L) * norm2 (x - y) <= norm2 ((x + f x) - (y + f y)) <= (1 + L) * norm2 (x - y).
Proof.
apply: (@Lemma5.residual_bilipschitz K _ (@norm2 K d) _ _ f L f_lip).
- exact: ler_norm2D.
- exact: norm2N.
Qed.

Theorem lemma5_euclidean_bijective : L < 1 ->
  exists Tinv : 'cV[K]_d -> 'cV[K]_d, [/\ cancel (fun x => x + f x) Tinv, cancel Tinv (fun x => x + f x) &
    forall x y, norm2 (Tinv x - Tinv y) <= norm2 (x - y) / (1 - L)].
Proof.
move=> L1; apply: (@Lemma5.residual_inverse K _ (@norm2 K d) _ _ _ _ f L f_lip L1).
- exact: norm2_ge0.
- exact: norm2_eq0.
- exact: ler_norm2D.
- exact: norm2N.
- exact: Lemma5.euclidean_fixpoint.
Qed.

End EuclideanSpace.
End ResidualMaps.

(** ** Relative entropy *)

Theorem gibbs (X : finType) (q p : dist X) : (0%:E <= kl q p)%E /\ (kl q p = 0%:E <-> q =1 p).
Proof. exact: FiniteKL.gibbs. Qed.

Theorem data_processing (X Y : finType) (g : X -> Y) (q p : dist X) :
  (kl (push g q) (push g p) <= kl q p)%E.
Proof. exact: FiniteKL.data_processing. Qed.

(** ** Propositions 2 and 4, Theorem 3 *)

(** Fine-tuning: [p_phi] are the output laws that a family of generators can reach. *)
Section Proposition2.
Variables (Y : finType) (p_base : dist Y) (r : Y -> R) (alpha : R).
Variables (Phi : Type) (p_phi : Phi -> dist Y).

Definition J_gen (phi : Phi) : \bar R := (kl (p_phi phi) p_base - (mean (p_phi phi) r / alpha)%:E)%E.

Theorem prop2 (phi : Phi) :
  kl (p_phi phi) (tilt alpha r p_base) = (J_gen phi + (ln (normaliser alpha r p_base))%:E)%E.
Proof. exact: Tilt.kl_tilt. Qed.

Theorem prop2_minimisers (phi : Phi) :
  (forall psi, (kl (p_phi phi) (tilt alpha r p_base) <= kl (p_phi psi) (tilt alpha r p_base))%E) <->
  (forall psi, (J_gen phi <= J_gen psi)%E).
Proof. exact: Tilt.kl_tilt_minimisers. Qed.

End Proposition2.

(** A fixed generator [g] and noise law [p0]: the output law is [push g p0]. *)
Section TiltedNoise.
Variables (X Y : finType) (g : X -> Y) (p0 : dist X) (r : Y -> R) (alpha : R).

Definition p0_star : dist X := tilt alpha (r \o g) p0.
Definition p_star : dist Y := tilt alpha r (push g p0).
Definition log_Z : R := ln (normaliser alpha r (push g p0)).

(** Equation 21: noise space and output space have the same normaliser. *)
Theorem normaliser_noise : normaliser alpha r (push g p0) = normaliser alpha (r \o g) p0.
Proof. exact: Tilt.normaliser_push. Qed.

Section Proposition4.
Variables (Phi : Type) (q : Phi -> dist X).

Definition J_noise (phi : Phi) : \bar R := (kl (q phi) p0 - (mean (q phi) (r \o g) / alpha)%:E)%E.

Theorem prop4 (phi : Phi) : kl (q phi) p0_star = (J_noise phi + log_Z%:E)%E.
Proof. by rewrite /log_Z normaliser_noise; exact: Tilt.kl_tilt. Qed.

Theorem prop4_minimisers (phi : Phi) :
  (forall psi, (kl (q phi) p0_star <= kl (q psi) p0_star)%E) <->
  (forall psi, (J_noise phi <= J_noise psi)%E).
Proof. exact: Tilt.kl_tilt_minimisers. Qed.

(** The optimality gap: [J_noise + ln Z] is never negative, and zero exactly at the tilted noise law. *)
Theorem optimality_gap (phi : Phi) :
  (0%:E <= J_noise phi + log_Z%:E)%E /\ ((J_noise phi + log_Z%:E)%E = 0%:E <-> q phi =1 p0_star).
Proof. by rewrite -prop4; exact: FiniteKL.gibbs. Qed.

End Proposition4.

Theorem theorem3_pushforward : push g p0_star =1 p_star.
Proof. exact: Tilt.theorem3_pushforward. Qed.

Theorem theorem3_minimiser (q : dist X) : push g q =1 p_star ->
  (kl p0_star p0 <= kl q p0)%E /\ ((kl q p0 <= kl p0_star p0)%E -> q =1 p0_star).
Proof. exact: Tilt.theorem3_minimiser. Qed.

End TiltedNoise.

(** ** Reward per nat *)

(** What a law gains within its divergence from [p] ([kl_sum] is the divergence, where it is finite), at every
    temperature; and the tilted law attains it. *)
Section RewardPerNat.
Variables (X : finType) (alpha : R) (r : X -> R) (p : dist X).

Theorem frontier_bound (q : dist X) : 0 < alpha -> dominated q p ->
  mean q r <= alpha * (kl_sum q p + ln (normaliser alpha r p)).
Proof. by move=> a0 qp; exact: Frontier.frontier_bound. Qed.

Theorem frontier_attained : 0 < alpha ->
  mean (tilt alpha r p) r = alpha * (kl_sum (tilt alpha r p) p + ln (normaliser alpha r p)).
Proof. by move=> a0; exact: Frontier.frontier_attained. Qed.

End RewardPerNat.

(** [Frontier.product p] is the law of independent draws, one of each [p i]; [F i] estimates [Z i] from its draw, which
    may itself be of many samples. That the product of the [F i] is [1 / delta] times that of the [Z i] or more has
    probability [delta] at most. *)
Theorem certified_normaliser (I X : finType) (p : I -> dist X) (F : I -> X -> R) (Z : I -> R) (delta : R) :
  (forall i x, 0 <= F i x) -> (forall i, mean (p i) (F i) = Z i) -> (forall i, 0 < Z i) -> 0 < delta ->
  Frontier.prob (Frontier.product p) [pred f : {ffun I -> X} | \prod_i Z i <= delta * \prod_i F i (f i)] <= delta.
Proof. by move=> F0 FZ Z0 d0; exact: Frontier.certified_normaliser. Qed.

(** ** Best-of-n *)

(** [n] independent draws of [p] are [f]; the rule sees their rewards, and chooses the draw [i] with the probability
    [rule s i], which is zero unless its reward is the largest; ties are broken by it. [q] is the law of the chosen. *)
Theorem best_of_n (X : finType) (r : X -> R) (p q : dist X) (n : nat) (rule : {ffun 'I_n -> R} -> 'I_n -> R) :
  (0 < n)%N ->
  (forall s i, 0 <= rule s i) -> (forall s, \sum_i rule s i = 1) ->
  (forall s i, rule s i != 0 -> forall j, s j <= s i) ->
  (forall x, q x = \sum_f Frontier.product (fun _ : 'I_n => p) f * \sum_(i | f i == x) rule [ffun j => r (f j)] i) ->
  (kl q p <= (ln n%:R - (n%:R - 1) / n%:R)%:E)%E.
Proof.
case: n rule => // k rule _ rule_ge0 rule_sum1 rule_best qE.
rewrite (_ : k.+1%:R - 1 = k%:R); last by rewrite -addn1 natrD addrK.
rewrite (eq_kl (_ : q =1 BestOf.best r p rule_ge0 rule_sum1) (frefl p)) //.
by rewrite /kl BestOf.best_dominated lee_fin; exact: BestOf.best_of.
Qed.

(** Such a law there is, with ties broken at random. *)
Theorem best_of_n_at_random (X : finType) (r : X -> R) (p : dist X) (n : nat) : (0 < n)%N ->
  exists2 q : dist X,
    forall x, q x = \sum_f Frontier.product (fun _ : 'I_n => p) f *
      (#|[pred i | (f i == x) && [forall j, r (f j) <= r (f i)]]|%:R / #|[pred i | [forall j, r (f j) <= r (f i)]]|%:R)
  & (kl q p <= (ln n%:R - (n%:R - 1) / n%:R)%:E)%E.
Proof.
case: n => // k _.
pose q := BestOf.best r p (@BestOf.at_random_ge0 k) (@BestOf.at_random_sum1 k).
have qE x : q x = \sum_f Frontier.product (fun _ : 'I_k.+1 => p) f *
    \sum_(i | f i == x) BestOf.at_random [ffun j => r (f j)] i by [].
exists q; last by apply: best_of_n qE => //; [exact: BestOf.at_random_ge0 | exact: BestOf.at_random_sum1 |
  exact: BestOf.at_random_best].
move=> x; rewrite qE; apply: eq_bigr => f _; congr (_ * _).
have b i : BestOf.is_best [ffun j => r (f j)] i = [forall j, r (f j) <= r (f i)].
  by apply: eq_forallb => j; rewrite !ffunE.
rewrite /BestOf.at_random -big_mkcondr sumr_const -[LHS]mulr_natl; congr (_%:R / _%:R).
  by apply: eq_card => i; rewrite unfold_in [RHS]unfold_in /= b.
by apply: eq_card => i; rewrite unfold_in [RHS]unfold_in /= -b.
Qed.

(** ** The price of the L2 loss *)

(** [s - 1 - ln s >= 0], with equality only at [s = 1]. *)
Theorem covariance_gap_nonneg (s : R) : 0 < s -> 0 <= s - 1 - ln s.
Proof. by move=> /RltP s0; apply/RleP/Scalar.covariance_gap_nonneg. Qed.

Theorem covariance_gap_zero (s : R) : 0 < s -> (s - 1 - ln s = 0 <-> s = 1).
Proof. by move=> /RltP s0; exact: Scalar.covariance_gap_eq0. Qed.
