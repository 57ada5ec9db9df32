(** * What the best of several draws costs in nats, on finite probability spaces

    [n = k + 1] independent draws of [p], a real-valued reward [r] with any ties, and a rule that chooses, from the
    rewards of the draws alone and by chance, one of the draws of the largest reward.  In words:

    - [share_eq]: what the rule makes of a point, per unit of its mass, depends on the point by its reward alone.
    - [density_class]: therefore the chosen one has, with respect to [p], the density
      [(b ^ n - a ^ n) / (b - a)], where [a] is the mass of the smaller rewards and [b] that of those up to its own.
    - [telescope]: sums over the classes of equal reward telescope.
    - [best_of]: the divergence of the chosen one from [p] is at most [ln n - (n - 1) / n].
    - [at_random]: the choice at random among the best is such a rule. *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct constructive_ereal.
From hnkit Require Import RealBridge FiniteKL Frontier.
From hnkit Require Scalar.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.

(** ** The law of the best *)

Section Law.
Variables (X : finType) (r : X -> R) (p : dist X) (k : nat).
Variable rule : {ffun 'I_k.+1 -> R} -> 'I_k.+1 -> R.
Hypothesis rule_ge0 : forall s i, 0 <= rule s i.
Hypothesis rule_sum1 : forall s, \sum_i rule s i = 1.
Hypothesis rule_best : forall s i, rule s i != 0 -> forall j, s j <= s i.

Let draws := product (fun _ : 'I_k.+1 => p).
Definition rewards (f : {ffun 'I_k.+1 -> X}) : {ffun 'I_k.+1 -> R} := [ffun i => r (f i)].
Definition best_pmf (x : X) : R := \sum_f draws f * \sum_(i | f i == x) rule (rewards f) i.

Lemma best_ge0 x : 0 <= best_pmf x.
Proof. by apply: sumr_ge0 => f _; rewrite mulr_ge0 ?pmf_ge0 ?sumr_ge0. Qed.

(** The probability that the chosen one is in a set. *)
Lemma best_set (A : pred X) :
  \sum_(x | A x) best_pmf x = \sum_f draws f * \sum_(i | A (f i)) rule (rewards f) i.
Proof.
rewrite exchange_big /=; apply: eq_bigr => f _; rewrite -mulr_sumr; congr (_ * _).
rewrite [RHS](partition_big (fun i => f i) A) //=; apply: eq_bigr => x Ax.
by apply: eq_bigl => i; case: eqP => [->|_]; rewrite ?Ax ?andbF.
Qed.

Lemma best_sum1 : \sum_x best_pmf x = 1.
Proof.
rewrite (best_set xpredT) -(pmf_sum1 draws); apply: eq_bigr => f _.
by rewrite rule_sum1 mulr1.
Qed.

Definition best : dist X := Dist best_ge0 best_sum1.

(** The chance, per unit of its mass, that [x] is the [i]-th draw and chosen; it depends on [x] by its reward alone. *)
Definition share i x : R := \sum_(f : {ffun 'I_k.+1 -> X} | f i == x) (\prod_(j | j != i) p (f j)) * rule (rewards f) i.
Definition density x : R := \sum_i share i x.

Lemma bestE x : best_pmf x = p x * density x.
Proof.
rewrite /best_pmf; under eq_bigr do rewrite mulr_sumr.
rewrite (exchange_big_dep xpredT) //= mulr_sumr; apply: eq_bigr => i _.
rewrite mulr_sumr; apply: eq_bigr => f /eqP fx.
by rewrite /prod_pmf (bigD1 i) //= fx mulrA.
Qed.

Definition swap (f : {ffun 'I_k.+1 -> X}) i x : {ffun 'I_k.+1 -> X} := [ffun j => if j == i then x else f j].

Lemma share_eq i x y : r x = r y -> share i x = share i y.
Proof.
move=> rxy; rewrite /share (reindex_onto (fun f => swap f i x) (fun f => swap f i y)) /=; last first.
  by move=> f /eqP fx; apply/ffunP => j; rewrite !ffunE; case: (j =P i) => [->|//].
apply: eq_big => [f|f /andP[_ /eqP e]].
  rewrite ffunE eqxx eqxx /=; apply/eqP/eqP => [<-|fy]; first by rewrite !ffunE eqxx.
  by apply/ffunP => j; rewrite !ffunE; case: (j =P i) => [->|//].
congr (_ * _); first by apply: eq_bigr => j /negbTE ji; rewrite ffunE ji.
have fy : f i = y by rewrite -e !ffunE eqxx.
congr (rule _ _); apply/ffunP => j; rewrite !ffunE; case: (j =P i) => [->|//].
by rewrite fy.
Qed.

(** The mass of the rewards below, and up to, that of [x]. *)
Definition below x : R := prob p [pred y | r y < r x].
Definition upto x : R := prob p [pred y | r y <= r x].

Lemma upto_sub x : upto x = below x + \sum_(y | r y == r x) p y.
Proof.
rewrite /upto /below /prob (bigID [pred y | r y < r x]) /=; congr (_ + _); apply: eq_bigl => y.
  by rewrite andbC; case: ltP => //= /ltW ->.
by rewrite -leNgt; rewrite eq_le.
Qed.

Lemma prob_all (A : pred X) : \sum_f draws f * \prod_i (A (f i))%:R = prob p A ^+ k.+1.
Proof.
rewrite (prod_mean (fun _ => p) (fun _ x => (A x)%:R)) prodr_const card_ord; congr (_ ^+ _).
by rewrite /mean /prob [RHS]big_mkcond; apply: eq_bigr => x _; case: (A x); rewrite ?mulr1 ?mulr0.
Qed.

Lemma prod_bool (A : pred 'I_k.+1) i : (forall j, A i -> A j) -> \prod_j ((A j)%:R : R) = (A i)%:R.
Proof.
move=> all; case Ai : (A i); first by apply: big1 => j _; rewrite all.
by rewrite (bigD1 i) //= Ai mul0r.
Qed.

Lemma chosen (s : {ffun 'I_k.+1 -> R}) v :
  \sum_(i | s i == v) rule s i = \prod_i (s i <= v)%R%:R - \prod_i (s i < v)%R%:R.
Proof.
have [i ri] : exists i, rule s i != 0.
  apply/existsP; rewrite -[X in is_true X]negbK negb_exists; apply/negP => /forallP z.
  have := oner_eq0 [ringType of R]; rewrite -(rule_sum1 s) big1 ?eqxx // => j _.
  by apply/eqP; have := z j; rewrite negbK.
have smax := rule_best ri.
have srule j : rule s j != 0 -> s j = s i by move=> rj; apply: le_anti; rewrite smax (rule_best rj).
rewrite (@prod_bool (fun j => (s j <= v)%R) i) => [|j]; last by apply: le_trans.
rewrite (@prod_bool (fun j => (s j < v)%R) i) => [|j]; last by apply: le_lt_trans.
have -> : \sum_(j | s j == v) rule s j = (s i == v)%:R.
  have [e|ne] := eqVneq (s i) v.
    rewrite -[RHS](rule_sum1 s) big_mkcond; apply: eq_bigr => j _.
    case: ifP => // sj; apply/eqP; apply: contraFT sj => sj.
    by rewrite eq_sym srule 1?eq_sym //; apply/eqP.
  apply: big1 => j /eqP sj; apply/eqP; apply: contraNT ne => /srule <-; exact/eqP.
by case: ltgtP => //= _; rewrite ?subr0 ?subrr.
Qed.

Lemma density_class x : (upto x - below x) * density x = upto x ^+ k.+1 - below x ^+ k.+1.
Proof.
rewrite upto_sub addrC addKr mulr_suml -!upto_sub.
transitivity (\sum_(y | r y == r x) best_pmf y).
  apply: eq_bigr => y /eqP ryx; rewrite bestE; congr (_ * _).
  by apply: eq_bigr => i _; apply: share_eq.
rewrite (best_set [pred y | r y == r x]) /upto /below -!prob_all -sumrB; apply: eq_bigr => f _.
rewrite -mulrBr; congr (_ * _).
have := chosen (rewards f) (r x).
under eq_bigl do rewrite ffunE; move=> ->.
by congr (_ - _); apply: eq_bigr => i _; rewrite ffunE.
Qed.

(** Sums over the classes of equal reward telescope. *)
Lemma telescope (G : R -> R) t :
  \sum_(x | r x < t) p x * ((G (upto x) - G (below x)) / (upto x - below x)) = G (prob p [pred y | r y < t]) - G 0.
Proof.
have [m] := ubnP #|[pred y | r y < t]|; elim: m t => // m ih t; rewrite ltnS => le_m.
have [x0 /= x0t|none] := pickP [pred y | r y < t]; last first.
  by rewrite big_pred0 // /prob big_pred0 // subrr.
have [x /= xt xmax] := @arg_maxP _ _ _ x0 [pred y | r y < t] r x0t.
have e : [pred y | r y < t] =1 [pred y | r y <= r x].
  by move=> y /=; apply/idP/idP => [/xmax //|/le_lt_trans]; apply.
have -> : prob p [pred y | r y < t] = upto x by apply: eq_bigl.
rewrite (bigID [pred y | r y < r x]) /=.
rewrite (eq_bigl (fun y => r y < r x)) => [|y]; last first.
  by rewrite andbC; case: ltP => //= yx; rewrite (lt_trans yx xt).
rewrite ih; last first.
  apply: leq_trans le_m; apply: proper_card; apply/properP; split.
    by apply/subsetP => y; rewrite !inE => yx; apply: lt_trans yx xt.
  by exists x; rewrite !inE // ltxx.
rewrite -/(below x).
rewrite (eq_bigl (fun y => r y == r x)) => [|y]; last first.
  have /= -> := e y; by rewrite -leNgt eq_le.
under eq_bigr => y /eqP yx do rewrite /upto /below yx -/(upto x) -/(below x).
rewrite -mulr_suml.
have -> : \sum_(y | r y == r x) p y = upto x - below x by rewrite upto_sub addrC addKr.
have [e0|ne] := eqVneq (upto x - below x) 0.
  by rewrite e0 mul0r addr0; move/eqP: e0; rewrite subr_eq0 => /eqP ->.
by rewrite mulrC divfK // addrC addrA subrK.
Qed.

(** ** Its divergence *)

Let G := Scalar.best_primitive k.

Lemma G0 : G 0 = 0.
Proof. by rewrite /G /Scalar.best_primitive /Rminus /Rdiv RpowE expr0n /= !RmultE RplusE RoppE !mul0r subr0. Qed.

Lemma G1 : G 1 = - k.+1%:R^-1.
Proof.
rewrite /G /Scalar.best_primitive /Rminus /Rdiv RpowE expr1n lnR1 !RmultE RplusE RoppE INRE RinvE ?pnatr_eq0 //.
by rewrite mulr0 mul1r add0r.
Qed.

Lemma step a b : 0 <= a -> a < b ->
  (b ^+ k.+1 - a ^+ k.+1) * ln ((b ^+ k.+1 - a ^+ k.+1) / (b - a)) <=
  (b ^+ k.+1 - a ^+ k.+1) * ln k.+1%:R + k%:R * (G b - G a).
Proof.
move=> a0 ab; move: a0; rewrite le_eqVlt => /predU1P[e|a0].
  move: ab; rewrite -e G0 expr0n /= !subr0 => b0.
  have /RleP := Scalar.best_step0 k _ (elimT (RltP _ _) b0).
  by rewrite !RpowE !INRE !RplusE !RmultE RdivE ?gt_eqF.
have ba : b - a != 0 by rewrite gt_eqF // subr_gt0.
have /RleP := Scalar.best_step_pos k _ _ (elimT (RltP _ _) a0) (elimT (RltP _ _) ab).
by rewrite !RpowE !INRE !RminusE RdivE // !RplusE !RmultE.
Qed.

Lemma below_upto x : 0 < p x -> below x < upto x.
Proof.
move=> px; rewrite upto_sub ltr_addl (bigD1 x) //=.
by rewrite (lt_le_trans px) // ler_addl sumr_ge0 // => y _; exact: pmf_ge0.
Qed.

Lemma below_ge0 x : 0 <= below x.
Proof. by apply: sumr_ge0 => y _; exact: pmf_ge0. Qed.

Lemma best_dominated : dominated best p.
Proof. by apply/dominatedP => x px; rewrite -[best x]/(best_pmf x) bestE px mul0r. Qed.

Lemma best_term x : best x * ln (best x / p x) <=
  best x * ln k.+1%:R + k%:R * (p x * ((G (upto x) - G (below x)) / (upto x - below x))).
Proof.
rewrite -[best x]/(best_pmf x) bestE.
have [->|/pmf_pos px] := eqVneq (p x) 0; first by rewrite !mul0r mulr0 addr0.
have ab := below_upto px.
have ab0 : 0 < upto x - below x by rewrite subr_gt0.
rewrite [p x * density x / p x]mulrC mulKf ?gt_eqF // -!mulrA [k%:R * _]mulrCA -mulrDr ler_pmul2l //.
have dE : density x = (upto x ^+ k.+1 - below x ^+ k.+1) / (upto x - below x).
  by rewrite -density_class mulrC mulKf ?gt_eqF.
have ci : 0 < (upto x - below x)^-1 by rewrite invr_gt0.
have := step (below_ge0 x) ab; rewrite dE.
move: (_^-1) ci => c ci.
move: (_ - _ : R) (ln _) (G _ - G _) => A l D.
by rewrite [A * c * l]mulrAC [A * c * _]mulrAC mulrA -mulrDl ler_pmul2r.
Qed.

Lemma best_of : kl_sum best p <= ln k.+1%:R - k%:R / k.+1%:R.
Proof.
apply: (le_trans (ler_sum _ (fun x _ => best_term x))).
rewrite big_split /= -mulr_suml (pmf_sum1 best) mul1r ler_add2l -mulr_sumr.
have [t tP] : exists t, forall x, r x < t.
  exists (1 + \sum_x `|r x|) => x; rewrite (le_lt_trans (ler_norm _)) // (bigD1 x) //= addrCA.
  by rewrite ltr_addl ltr_paddr ?sumr_ge0.
rewrite (eq_bigl (fun x => r x < t)); last by move=> x; rewrite tP.
rewrite telescope G0 subr0.
have -> : prob p [pred y | r y < t] = 1.
  by rewrite -(pmf_sum1 p) /prob; apply: eq_bigl => y /=; rewrite tP.
by rewrite G1 mulrN.
Qed.

End Law.

(** ** Ties broken at random *)

Section Uniform.
Variable k : nat.
Implicit Types s : {ffun 'I_k.+1 -> R}.

Definition is_best s : pred 'I_k.+1 := fun i => [forall j, s j <= s i].
Definition at_random s i : R := if is_best s i then #|is_best s|%:R^-1 else 0.

Lemma at_random_ge0 s i : 0 <= at_random s i.
Proof. by rewrite /at_random; case: ifP => // _; rewrite invr_ge0 ler0n. Qed.

Lemma at_random_best s i : at_random s i != 0 -> forall j, s j <= s i.
Proof. by rewrite /at_random; case: ifP => [/forallP //|_]; rewrite eqxx. Qed.

Lemma at_random_sum1 s : \sum_i at_random s i = 1.
Proof.
rewrite /at_random -big_mkcond sumr_const -[X in X = 1]mulr_natl divff // pnatr_eq0 -lt0n.
apply/card_gt0P; have [i /= _ imax] := @arg_maxP _ _ _ ord0 xpredT s isT.
by exists i; apply/forallP => j; apply: imax.
Qed.

End Uniform.
